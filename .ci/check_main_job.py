"""Check the results of the quick start run: accuracy and PSNR gain on digits."""

import json
import sys
from pathlib import Path

MIN_GAIN = {"15": 3.2, "25": 4.1, "50": 5.5}
"""Minimum PSNR gain over the noisy image in dB, by sigma * 255."""

run = Path(sys.argv[1])
classify = json.loads((run / "evaluation" / "classify.json").read_text())
denoise = json.loads((run / "evaluation" / "denoise.json").read_text())
gains = {s: denoise["psnr"][s] - denoise["psnr_noisy"][s] for s in MIN_GAIN}
print(f"accuracy {classify['accuracy']:.4f}, PSNR gains in dB {gains}")
cost = json.loads((run / "cost.json").read_text())
print(
    f"training: {cost['steps'] * cost['step_seconds']:.0f} s "
    f"({cost['steps']} steps of {cost['step_seconds']:.3f} s)"
)
failed = [
    f"PSNR gain at {s}/255 is below {low} dB" for s, low in MIN_GAIN.items() if gains[s] < low
]
if classify["accuracy"] < 0.985:
    failed.append("accuracy is below 98.5 %")
for plot in ("learning_curves.png", "evaluation/denoising.png"):
    if not (run / plot).is_file():
        failed.append(f"{plot} is missing")
sys.exit("; ".join(failed) or 0)
