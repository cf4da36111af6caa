"""How PEFT's adapters follow the module that they are put around."""
