"""Networks as bpnjax sees them: one adapter file per framework."""
