"""The Hugging Face Hub: names of models -> folders in its cache."""
