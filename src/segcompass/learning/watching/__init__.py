"""What is looked at while training: figures, health, panels."""
