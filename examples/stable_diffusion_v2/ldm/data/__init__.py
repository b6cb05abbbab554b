"""Captioned pictures as training batches: captions (CSV), images (files to arrays), dataset, batches."""
