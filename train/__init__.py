"""The three-stage LLaVA training pipeline: a slim DeepSpeed loop, its data, model building and checkpoints."""
