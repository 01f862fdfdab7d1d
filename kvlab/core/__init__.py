"""What a block is called (`identity`), what its bytes are (`record`) and how they are packed (`codecs`)."""
