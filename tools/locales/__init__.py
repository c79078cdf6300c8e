"""The pack's names and tooltips in other languages: ``locales/`` of English and of one list of texts a language."""
