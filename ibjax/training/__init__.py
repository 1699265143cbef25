"""From a configuration to a trained network: building an experiment, feeding images, and the training loop."""
