from amid_ds.cli import run

if __name__ == "__main__":
    run()
