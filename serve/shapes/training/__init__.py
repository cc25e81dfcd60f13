"""The stages of :mod:`serve.shapes.train`: tokenizer, autoencoder, latents, text encoder, U-Net, polish."""
