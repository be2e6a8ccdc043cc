"""New images from a trained VQ-VAE-2 and its priors, and what is left of them after encoding and decoding.

    python examples/quickstart.py FOLDER [PICTURE.png]

FOLDER is what `vqscale export runs/<experiment> FOLDER` wrote, or `runs/<experiment>` itself. The picture has a column
per class: samples above, their reconstructions below.
"""

import sys

import torch
from torchvision.utils import save_image

import vqscale

folder, picture = sys.argv[1], (sys.argv[2:] or ["quickstart.png"])[0]

images = vqscale.sample(folder, samples_per_class=1, seed=0)  # float [n, 3, R, R] in [-1, 1]
vqvae = vqscale.VQVAE.from_pretrained(folder)
codes = vqvae.encode(images)  # [top, bottom], each int64 [n, h, w]
again = vqvae.decode(codes)  # float [n, 3, R, R] in [-1, 1]
save_image(torch.cat([images, again]), picture, nrow=len(images), normalize=True, value_range=(-1, 1))

print(f"{picture}: {len(images)} samples of {len(vqvae.classes)} classes, codes {[tuple(c.shape) for c in codes]}")
