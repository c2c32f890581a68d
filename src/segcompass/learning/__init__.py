"""Training: ``train.py`` runs the stages, ``train_joint.py`` is the paper's step."""
