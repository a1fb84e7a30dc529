"""What is the policy that the engine must serve: the trainer's adapter, read and never written."""
