"""The only code that knows how an MoE block looks: discovery, routing, experts function, surgery, checkpoints."""
