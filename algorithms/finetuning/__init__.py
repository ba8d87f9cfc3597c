"""Methods that fine-tune a pretrained model, most of which stays frozen."""
