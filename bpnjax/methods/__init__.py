"""The methods: one file each, one line in the registry."""

from bpnjax.methods import bd, ewc, joint, psp, sgd, stl
from bpnjax.methods.base import Method, Spec, chain

BPN = "Wen et al. 2020, arXiv 2009.13954"

REGISTRY: dict[str, Method] = {
    method.name: method
    for method in (
        sgd.SGD,
        stl.STL,
        joint.JOINT,
        ewc.EWC,
        ewc.EWC_ONLINE,
        psp.PSP,
        chain("bd_ewc", bd.BD, ewc.EWC, paper=BPN),
        chain("bd_psp", bd.BD, psp.PSP, paper=BPN),
        chain("gd_ewc", bd.GD, ewc.EWC, paper=BPN),
    )
}

__all__ = ["REGISTRY", "Method", "Spec", "chain"]
