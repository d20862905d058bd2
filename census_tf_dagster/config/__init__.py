"""What a deployment declares: settings, placement, publication, retention and cost, validated where they enter."""
