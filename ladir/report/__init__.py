"""``python -m ladir report``: one page about one or several runs, with its pictures."""
