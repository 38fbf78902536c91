"""The measured virtual machine: its image, its boot, and its link to the host."""
