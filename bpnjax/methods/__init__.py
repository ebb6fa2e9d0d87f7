"""Continual-learning methods: functions with arguments, one file each.

methods.ewc(strength=0.03)
methods.chain(methods.bd(hidden_dim=50), methods.psp())
methods.bd_psp(hidden_dim=50)             # the same, by its name in the registry
"""

from bpnjax.methods import replay
from bpnjax.methods.base import Batch, Context, Method, Setup, TaskData, chain, output_leaves
from bpnjax.methods.settings import (
    _BUILT_IN,
    REGISTRY,
    Factory,
    Field,
    Range,
    Setting,
    compose,
    register,
)

# isort: split
from bpnjax.methods.bd import bd, gd, gd_matched
from bpnjax.methods.controls import output_mask, plain_bias, random_bias
from bpnjax.methods.ebll import ebll
from bpnjax.methods.er import der, derpp, er
from bpnjax.methods.ewc import ewc, ewc_online
from bpnjax.methods.ewc_kfac import ewc_kfac
from bpnjax.methods.fecam import fecam
from bpnjax.methods.frozen import frozen
from bpnjax.methods.gem import agem, gem
from bpnjax.methods.imm import imm_mean, imm_mode
from bpnjax.methods.joint import joint
from bpnjax.methods.lwf import lwf
from bpnjax.methods.mas import mas
from bpnjax.methods.ncm import ncm
from bpnjax.methods.psp import psp
from bpnjax.methods.ranpac import joint_ridge, ranpac
from bpnjax.methods.sgd import sgd
from bpnjax.methods.si import si
from bpnjax.methods.slda import slda
from bpnjax.methods.slnid import slnid
from bpnjax.methods.stl import stl
from bpnjax.methods.xdg import xdg

BPN = "Wen et al. 2020, arXiv 2009.13954"

bd_ewc = compose("bd_ewc", bd, ewc, paper=BPN)
bd_psp = compose("bd_psp", bd, psp, paper=BPN)
bd_psp_ewc = compose("bd_psp_ewc", bd, psp, ewc, paper="both of its protections at once")
bd_ewc_kfac = compose("bd_ewc_kfac", bd, ewc_kfac)
bd_psp_ewc_kfac = compose("bd_psp_ewc_kfac", bd, psp, ewc_kfac)
gd_ewc = compose("gd_ewc", gd, ewc, paper=BPN)
# Fair peers and controls. Who else knows the task, and which part of BPN helps?
xdg_ewc = compose("xdg_ewc", xdg, ewc, paper="Masse et al. 2018, arXiv 1802.01569")
ewc_masked = compose("ewc_masked", ewc, paper="control", join=output_mask)
gd_matched_ewc = compose("gd_matched_ewc", gd_matched, ewc, paper="control")
bias_ewc = compose("bias_ewc", plain_bias, ewc, paper="control")
SKILL = "Ge et al. 2023, arXiv 2305.15591"
bd_frozen = compose("bd_frozen", bd, frozen, paper=SKILL)
bias_frozen = compose("bias_frozen", plain_bias, frozen, paper=SKILL)
random_bias_ewc = compose("random_bias_ewc", random_bias, ewc, paper="control")

# The order of help and tables, which must not depend on the order of imports.
_ORDER = (
    sgd, stl, joint, ewc, ewc_online, ewc_kfac, si, mas, slnid, imm_mean, imm_mode, lwf, ebll, gem,
    agem, er, der, derpp, ncm, slda, fecam, ranpac, joint_ridge, psp, xdg, bd_ewc, bd_psp,
    bd_psp_ewc, bd_ewc_kfac, bd_psp_ewc_kfac, gd_ewc, xdg_ewc, ewc_masked, gd_matched_ewc, bias_ewc,
    random_bias_ewc, bd, gd, gd_matched, plain_bias, random_bias,
    frozen, bd_frozen, bias_frozen,
)  # fmt: skip
for _factory in _ORDER:
    REGISTRY[_factory.name] = REGISTRY.pop(_factory.name)
_BUILT_IN.update(REGISTRY)

__all__ = [
    "REGISTRY",
    "Batch",
    "Context",
    "Factory",
    "Field",
    "Method",
    "Range",
    "Setting",
    "Setup",
    "TaskData",
    "agem",
    "bd",
    "bd_ewc",
    "bd_ewc_kfac",
    "bd_frozen",
    "bd_psp",
    "bd_psp_ewc",
    "bd_psp_ewc_kfac",
    "bias_ewc",
    "bias_frozen",
    "chain",
    "compose",
    "der",
    "derpp",
    "ebll",
    "er",
    "ewc",
    "ewc_kfac",
    "ewc_masked",
    "ewc_online",
    "fecam",
    "frozen",
    "gd",
    "gd_ewc",
    "gd_matched",
    "gd_matched_ewc",
    "gem",
    "imm_mean",
    "imm_mode",
    "joint",
    "joint_ridge",
    "lwf",
    "mas",
    "ncm",
    "output_leaves",
    "output_mask",
    "plain_bias",
    "psp",
    "random_bias",
    "random_bias_ewc",
    "ranpac",
    "register",
    "replay",
    "sgd",
    "si",
    "slda",
    "slnid",
    "stl",
    "xdg",
    "xdg_ewc",
]
