"""Evaluation: what the scripts of this folder share. Run them from the folder above: `python eval/eval_fid.py`."""
