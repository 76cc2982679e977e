from run_folders import check_picture, tiny_dataset, write_run, write_trained_run  # noqa: F401
