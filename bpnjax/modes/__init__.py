"""What a mode is: the vectors of a task, and banks of them."""
