def test_digits(digits_run):
    assert (digits_run / "eval/best/fgsm.json").is_file()
