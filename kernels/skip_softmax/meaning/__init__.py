"""What skip-softmax attention means, without a kernel."""
