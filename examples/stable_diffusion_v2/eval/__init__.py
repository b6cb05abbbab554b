"""Evaluation: what the scripts of this folder share. Run them from the folder above: `python eval/eval_fid.py`."""

from ldm import runtime  # noqa: F401  (whatever of this is imported, the runtime comes before MindSpore)
