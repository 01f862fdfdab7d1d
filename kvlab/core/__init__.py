"""What a block is called (`keys`), what its bytes are (`record`) and how they are packed (`codecs`)."""
