"""Clean accuracy of the network in this folder, in plain PyTorch: python check.py [--data=FILE.npz]

Needs torch, safetensors and numpy. Without --data it uses the images of check.npz, which also holds the logits of
ibjax's network on them; it exits with 1 where the two differ by more than 1e-4. With --data it uses x_test
(N, H, W, C) and y_test of a file in Keras's layout.
"""

import argparse
import os
import sys
from pathlib import Path

import model
import numpy as np
import torch

FOLDER = Path(__file__).parent


def main():
    """The command line; exits with 1 where the logits differ from those of ibjax."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for characters outside the terminal's encoding
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(FOLDER / "check.npz"))
    file = os.path.expanduser(os.path.expandvars(parser.parse_args().data))  # as a shell would, but for --data=~/x
    with np.load(file, allow_pickle=False) as archive:
        images, labels, expected = archive["x_test"], archive["y_test"].reshape(-1), archive.get("logits")
    logits = predict(model.load(FOLDER), images)
    print(f"clean accuracy {accuracy(logits, labels):.2f} % of {len(labels)} images")
    if expected is not None:
        delta = np.abs(logits - expected).max()
        print(f"ibjax: {accuracy(expected, labels):.2f} %, max |Δlogit| {delta:.1e}")
        sys.exit(0 if delta <= 1e-4 else 1)


def predict(network, images):
    """(N, H, W, C) uint8, or float in [0, 1] -> logits (N, classes)."""
    scale = 255 if images.dtype == np.uint8 else 1
    with torch.no_grad():
        batches = [torch.from_numpy(images[i : i + 64]).permute(0, 3, 1, 2) / scale for i in range(0, len(images), 64)]
        return torch.cat([network(batch.float()) for batch in batches]).numpy()


def accuracy(logits, labels):
    """In percent, of logits (N, classes) and labels (N,)."""
    return 100 * (logits.argmax(1) == labels).mean()


if __name__ == "__main__":
    main()
