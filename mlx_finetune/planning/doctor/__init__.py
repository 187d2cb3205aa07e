"""`mlx-finetune doctor`: looks at the machine and at what is installed, changes nothing, and says what to do."""
