"""vqscale: distributed, large-scale training of VQ-VAE-2 and its PixelCNN priors."""

__version__ = "0.1.0"
