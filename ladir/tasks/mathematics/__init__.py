"""Reading answers to maths problems: one spelling, quantities, forms, formulas, and when two of them are equal."""
