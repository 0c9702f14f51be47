"""Each op's schema, argument checks, fake, autograd and public function; PyTorch's dispatcher picks the back end."""
