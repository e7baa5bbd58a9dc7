"""Early exit: prompts and tokens that leave a model before its last layer (AdaInfer)."""
