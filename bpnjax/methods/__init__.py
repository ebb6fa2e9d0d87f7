"""The methods: one file each, one line in the registry."""

from bpnjax.methods import (
    bd,
    controls,
    ebll,
    er,
    ewc,
    ewc_kfac,
    gem,
    imm,
    joint,
    lwf,
    mas,
    psp,
    sgd,
    si,
    slnid,
    stl,
    xdg,
)
from bpnjax.methods.base import Ended, Examples, Method, Spec, Step, chain

BPN = "Wen et al. 2020, arXiv 2009.13954"

REGISTRY: dict[str, Method] = {
    method.name: method
    for method in (
        sgd.SGD,
        stl.STL,
        joint.JOINT,
        ewc.EWC,
        ewc.EWC_ONLINE,
        ewc_kfac.EWC_KFAC,
        si.SI,
        mas.MAS,
        slnid.SLNID,
        imm.MEAN,
        imm.MODE,
        lwf.LWF,
        ebll.EBLL,
        gem.GEM,
        gem.AGEM,
        er.ER,
        er.DER,
        er.DERPP,
        psp.PSP,
        xdg.XDG,
        chain("bd_ewc", bd.BD, ewc.EWC, paper=BPN),
        chain("bd_psp", bd.BD, psp.PSP, paper=BPN),
        chain("bd_psp_ewc", bd.BD, psp.PSP, ewc.EWC, paper="both of its protections at once"),
        chain("bd_ewc_kfac", bd.BD, ewc_kfac.EWC_KFAC),
        chain("bd_psp_ewc_kfac", bd.BD, psp.PSP, ewc_kfac.EWC_KFAC),
        chain("gd_ewc", bd.GD, ewc.EWC, paper=BPN),
        # Fair peers and controls: who else knows the task, and what is it that helps?
        chain("xdg_ewc", xdg.XDG, ewc.EWC, paper="Masse et al. 2018, arXiv 1802.01569"),
        controls.output_mask("ewc_masked", ewc.EWC),
        chain("gd_matched_ewc", bd.GD_MATCHED, ewc.EWC, paper="control"),
        chain("bias_ewc", controls.PLAIN_BIAS, ewc.EWC, paper="control"),
        chain("random_bias_ewc", controls.RANDOM_BIAS, ewc.EWC, paper="control"),
    )
}

__all__ = ["REGISTRY", "Ended", "Examples", "Method", "Spec", "Step", "chain"]
