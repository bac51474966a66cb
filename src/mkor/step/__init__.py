"""What a step does with what was captured: learn, precondition, write back."""
