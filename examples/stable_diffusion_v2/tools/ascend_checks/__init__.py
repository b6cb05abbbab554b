"""What tools/check_ascend.py checks: `machine` without MindSpore, `operators` and `model` on the device."""
