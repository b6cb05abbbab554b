"""Several processes as one run: who they are, where they meet, and the launcher that starts them."""
