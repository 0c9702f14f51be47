"""Each op's schema, argument checks, fake, autograd and public function; back ends are chosen by PyTorch's dispatcher."""
