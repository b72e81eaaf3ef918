"""What each training is: its model, losses and samples; one module each."""
