"""Words that bring any experiment's stages down to seconds on a CPU."""

ALL = ["device=cpu", "threads=1"]
_TRAINER = [*ALL, "total_images=64", "global_batch=32", "log_every=32", "save_every=64", "evaluate_every=64"]
_TRAINER += ["evaluate_images=16", "workers=0", "warmup_images=0"]
_VQVAE = ["model.hidden=16", "model.residual_hidden=8", "model.quantizer.num_codes=32", "model.quantizer.code_dim=8"]
_PRIOR = ["model.hidden=16", "model.residual=16", "model.layers=2", "model.heads=2", "model.output_layers=1"]
_PRIOR += ["model.conditioning_layers=1", "model.class_dim=8"]

# By config file, in the order of the pipeline
REDUCED = {
    "pack": [*ALL, "samples_per_shard=50", "workers=0"],
    "train_vqvae": [*_TRAINER, *_VQVAE, "init_images=64"],
    "extract_codes": [*ALL, "block=32", "workers=0"],
    "train_prior_top": [*_TRAINER, *_PRIOR, "model.attention_every=1"],
    "train_prior_middle": [*_TRAINER, *_PRIOR, "model.attention_every=2"],
    "train_prior_bottom": [*_TRAINER, *_PRIOR],
    "sample": [*ALL, "samples_per_class=1", "batch=10"],
    "evaluate": [*ALL, "workers=0"],
}
