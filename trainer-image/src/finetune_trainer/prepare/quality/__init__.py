"""What makes data good or bad, as functions of texts and tokens alone, without records or where
they come from."""
