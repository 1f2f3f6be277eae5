"""Problems with an exact checker. Pure."""
