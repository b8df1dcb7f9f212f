"""From records to examples: what a record of each format holds, and the text that is made of it."""
