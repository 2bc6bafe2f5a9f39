"""What a vision-language model consists of: its modules, visual tokens and attention. Changes no model."""
