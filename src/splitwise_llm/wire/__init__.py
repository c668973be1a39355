"""The wire: messages, tensor codec, links and the shaper; it refuses to know the model, the engine and policies."""
