"""Captioned pictures as training batches: caption tables, captions, images (files to arrays), dataset, batches."""
