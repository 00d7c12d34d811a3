"""What programs that are not recipes use: `hvdtrain.diagnose` around a training loop of their own."""
