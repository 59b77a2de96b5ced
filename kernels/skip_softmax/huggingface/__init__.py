"""Skip-softmax inside Hugging Face models; the only folder that imports transformers."""
