"""The launchers that hvdtrain brings: one module each, which registers itself."""
