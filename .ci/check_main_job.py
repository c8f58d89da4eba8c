"""Check the results of the default run: accuracy and gain in PSNR on digits."""

import json
import sys
from pathlib import Path

FLOOR = {"15": 3.2, "25": 4.1, "50": 5.5}
"""dB above the noisy image, by sigma * 255."""

run = Path(sys.argv[1])
classify = json.loads((run / "evaluation" / "classify.json").read_text())
denoise = json.loads((run / "evaluation" / "denoise.json").read_text())
gains = {s: denoise["psnr"][s] - denoise["psnr_noisy"][s] for s in FLOOR}
print(f"accuracy {classify['accuracy']:.4f}, gains in dB {gains}")
cost = json.loads((run / "cost.json").read_text())
print(
    f"training: {cost['steps'] * cost['step_seconds']:.0f} s "
    f"({cost['steps']} steps of {cost['step_seconds']:.3f} s)"
)
failed = [f"gain at {s}/255 is below {floor} dB" for s, floor in FLOOR.items() if gains[s] < floor]
if classify["accuracy"] < 0.985:
    failed.append("accuracy is below 98.5 %")
for picture in ("learning_curves.png", "evaluation/denoising.png"):
    if not (run / picture).is_file():
        failed.append(f"{picture} is missing")
sys.exit("; ".join(failed) or 0)
