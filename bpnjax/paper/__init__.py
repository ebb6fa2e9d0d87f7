"""The paper's figures and tables, each from one command, drawn from the files of ordinary runs.

    python -m bpnjax.paper --artefact=fig6a --workdir=runs/paper

Source of all paper figures: Wen, Rios, Ge, Itti 2020, arXiv 2009.13954.
"""
