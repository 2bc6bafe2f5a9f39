"""What a vision-language model of transformers is: its parts, its visual tokens, its attention. Changes no model."""
