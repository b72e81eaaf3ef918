"""An iteration of stage 3 on all ranks: who is asked, how the answers are judged, and the steps that learn from them."""
