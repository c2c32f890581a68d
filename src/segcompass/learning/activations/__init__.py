"""Hidden states of the frozen policy, streamed: what the autoencoder is trained on."""
